class Watch:
    pass


watch = None
