"""A round as one page to send to somebody: what it holds (`facts`), where that comes from (`gather`), what it says in
words (`words`), and how it looks (`html`)."""
