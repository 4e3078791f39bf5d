"""`leases demo`: worker processes share the streams of a file, some are killed and frozen, and the log is proved whole.

source      the CSV file, checked and cut into streams
ground      the database: made ready, taken back, looked at
wire        what the supervisor and a worker say to one another
worker      one worker process, and `brink`, where it is struck
plan        what the run is to be
supervisor  starts the workers, strikes them, lets some join and leave, and ends them whatever happens; `process` is one
board       what is known of the run while it goes on; `view` shows it
proof       at the end, from the database and the file
command     the command line
"""
