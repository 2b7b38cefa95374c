"""Model folders of tercet and of other libraries: reading and writing them."""
