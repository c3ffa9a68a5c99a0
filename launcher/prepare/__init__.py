"""`speechctl prepare`: looks at every host at once, judges what it found, and mends what is safe to mend."""
