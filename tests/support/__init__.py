"""What tests share: tiny sets and runs, processes to start and to kill, servers on the loopback."""
