"""For test suites, also those of others: small models of every family."""
