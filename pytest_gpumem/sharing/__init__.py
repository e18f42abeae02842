"""Who may use a card now: leases, admission, learned peaks, and the scheduler for xdist."""
