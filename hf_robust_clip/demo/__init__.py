"""A page on which people look at one picture: what an undefended and a robust model see in it, clean and attacked."""
