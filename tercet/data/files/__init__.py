"""Files of examples, texts and documents."""
