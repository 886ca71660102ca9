"""What keeps the daemon observable: logs, metrics, health, the control socket, notifications.

Nothing here knows files, chunks or Discord: health and control are handed callables by the daemon.
"""
