"""The documents: pages made of the code, pictures, and the site of them all. `make docs` builds it."""
