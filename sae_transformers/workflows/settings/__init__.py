"""What can be chosen in each workflow. No torch is imported here: the command line makes its options of these."""
