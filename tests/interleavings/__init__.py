"""All orders of the statements of two or three clients on a real PostgreSQL: see README.md beside this file."""
