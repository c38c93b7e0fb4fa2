directories.tokendir = /tmp/w2/tok
objectstore.backend = file
