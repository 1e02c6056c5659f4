"""Data sets: tables of pairs in, a ledger and a report out."""
