"""The page for operators: the fleet as it is, the last hour, and where a request's time went."""
