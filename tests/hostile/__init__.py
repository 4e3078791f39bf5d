"""Hostile input: whatever a caller passes and wherever the database stands, only our errors come out, in time.

Three laws, in `laws`: only `LeasesError` is raised (and `TypeError` for a call of the wrong shape); within a deadline;
and a refused call has changed no row. And one for all output: no password. The values are in `values`, one list for
each kind of parameter; what is attacked is in `surface`: a public name or a parameter that stands in neither fails
`test_complete`.
"""
