"""One file per runtime that can execute a bundle's graphs on this host."""
