label start:
    b "one\
