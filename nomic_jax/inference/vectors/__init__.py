"""Files of vectors that ``launch.embed`` writes: blocks of the input, parts of the output, what they were made with."""
