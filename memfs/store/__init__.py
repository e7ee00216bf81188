"""Where bytes lie: backings, one regular file, its pages, accounts and seals."""
