"""Records for the viewers that people have open, and watches for the trainers that they use."""
