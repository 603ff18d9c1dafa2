"""Entry points: read a configuration, connect, run, report. Nothing imports this package."""
