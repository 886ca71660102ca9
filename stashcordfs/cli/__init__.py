"""The commands, one file each, without logic of their own: they ask, call and report."""
