"""What stands in for a card, and for ZeMosaic's window."""
