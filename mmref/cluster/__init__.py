"""Ray: which cluster a command uses, what it offers, and every private name of Ray's that mmref relies on."""
