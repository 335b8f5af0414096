def running(root):
    return None
