"""What every command of the terminal shares: types of arguments, output that any terminal shows, exit status."""
