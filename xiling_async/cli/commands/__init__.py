"""One file for each command of `xiling` that fits into one."""
