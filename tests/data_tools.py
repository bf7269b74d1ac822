"""Pairs of text and of messages, and completions with ranks, for the tests of reading."""


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def ranked(**columns):
    return {"prompt": [user("1+1?")], "completions": [[bot(t)] for t in "abcd"], **columns}


TEXT = {"prompt": "Q: 1+1? A:", "chosen": " 2", "rejected": " 3"}
CHAT = {"prompt": [user("1+1?")], "chosen": [bot("2")], "rejected": [bot("3")]}
TWO_TURNS = [user("hi"), bot("hello"), user("1+1?")]
