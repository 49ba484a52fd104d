"""A teacher's scores of every candidate of a row, as a column."""
