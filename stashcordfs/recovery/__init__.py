"""Reading back what vfs and store have written: checking, and mending what can be mended."""
