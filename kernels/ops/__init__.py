"""One operation, one file: the formula, a torch reference, then a kernel where there is one."""
