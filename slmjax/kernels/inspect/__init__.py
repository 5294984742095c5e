"""What a compiler made of a kernel, for chips that need not be there."""
