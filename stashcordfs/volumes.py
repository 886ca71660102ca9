"""Where a volume's local state lies."""
