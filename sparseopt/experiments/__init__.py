"""Floor 7: what turns runs into pictures and tables for people."""
