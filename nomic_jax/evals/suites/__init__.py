"""Which tasks of which data a suite has: local folders, mteb, LoCo, GLUE."""
