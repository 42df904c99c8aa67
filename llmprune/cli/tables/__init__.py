"""What the commands show on stdout: tables that fit 80 columns. Reads results, computes none."""
