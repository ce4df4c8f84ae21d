def hostile(folder):
    yield from ()
