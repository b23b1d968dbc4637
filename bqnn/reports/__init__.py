"""What a user is told of a network: the health of its layers, and where its time goes."""
