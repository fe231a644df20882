"""What products leave of the communication that they hide, in closed form."""
