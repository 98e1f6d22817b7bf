"""What is asked of torch's private parts."""
