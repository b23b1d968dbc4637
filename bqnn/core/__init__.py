"""What everything stands on: codes, codebooks, random numbers, checks, geometry, files, the compiled extensions."""
