def main(check=False):
    return 0
