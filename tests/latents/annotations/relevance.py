"""Short descriptions of made-up features, and which of them ten queries mean: judged by hand."""

DESCRIPTIONS = """
sarcastic replies that mean the opposite of what they say
ironic comments on the news
mocking praise, said in jest
jokes with a twist at the end
dry humour and understatement
names of rivers and streams
lakes, ponds and still water
boats and ships at sea
bridges over a river
flooding after heavy rain
legal contracts and their clauses
court rulings and judges
laws passed by parliament
criminal trials and verdicts
patents and intellectual property
Python function definitions
loops and iteration in code
error messages and stack traces
variable names in camel case
comments inside source code
cooking recipes with measured ingredients
baking bread and pastry
restaurant reviews
spices and seasoning
vegetables and fruit at the market
expressions of gratitude
apologies and regret
angry complaints from customers
feelings of sadness and grief
joy and celebration
dates in the month of January
years of the nineteenth century
weekdays and times of day
football scores and matches
tennis players and tournaments
Olympic medals and athletes
doctors diagnosing an illness
prescription drugs and dosage
symptoms of influenza
hospital surgery and operations
stars, planets and galaxies
rockets and space missions
telescopes observing the sky
gravity and black holes
stock prices falling
central bank interest rates
company earnings reports
refusals to answer a harmful question
warnings about dangerous requests
polite disclaimers of an assistant
French words and phrases
German compound nouns
translation between languages
capital letters at the start of a sentence
closing brackets
commas in a list
quotation marks around speech
female pronouns and names
male pronouns and names
family relations such as mother and brother
""".strip().splitlines()

# The query, and the features (lines, from 0) that a reader would want to see.
RELEVANT = {
    "sarcasm": {0},
    "river": {5, 8},
    "court and judges": {11, 13},
    "programming code comments": {15, 16, 17, 19},
    "baking recipe": {20, 21},
    "apologising": {26},
    "sports matches": {33, 34, 35},
    "symptoms of an illness": {36, 38},
    "planets and telescopes": {40, 42},
    "refusing harmful requests": {47, 48},
}
