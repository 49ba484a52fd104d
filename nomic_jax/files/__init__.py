"""Opens, writes, walks and locks files. The other packages go through here for files that others may have prepared."""
