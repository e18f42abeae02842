"""Who may use the card now, among all processes of a user."""
