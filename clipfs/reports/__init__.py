"""What a mount did, told to people and programs."""
