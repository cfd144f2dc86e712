"""`xiling demo`: the whole road on this machine, with faults, checked against the service's ledger."""
