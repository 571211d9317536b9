"""What the command line runs, a command each."""
