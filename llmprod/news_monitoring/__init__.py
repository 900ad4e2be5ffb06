"""14_news_monitoring: a stream of news, watched for surges of bad news."""
