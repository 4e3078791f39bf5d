"""Worker. Real threads and real time, on both engines. What can be decided in virtual time is tried in tests/fleet."""
