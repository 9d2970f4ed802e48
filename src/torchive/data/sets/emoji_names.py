"""The classes of ``emoji`` and ``emoji-activities``: short names of its package, in the order of the code points."""

from __future__ import annotations

_NAMES = """
santa boy girl man male-farmer male-cook man_feeding_baby male-student male-singer male-artist male-teacher
male-factory-worker male-technologist male-office-worker male-mechanic male-scientist male-astronaut
male-firefighter red_haired_man curly_haired_man bald_man white_haired_man male-doctor male-judge male-pilot
woman female-farmer female-cook woman_feeding_baby female-student female-singer female-artist female-teacher
female-factory-worker female-technologist female-office-worker female-mechanic female-scientist
female-astronaut female-firefighter red_haired_woman curly_haired_woman bald_woman white_haired_woman
female-doctor female-judge female-pilot cop female-police-officer male-police-officer bride_with_veil
woman_with_veil man_with_veil person_with_blond_hair blond-haired-woman blond-haired-man man_with_gua_pi_mao
man_with_turban woman-wearing-turban man-wearing-turban older_man older_woman baby construction_worker
female-construction-worker male-construction-worker princess angel information_desk_person
woman-tipping-hand man-tipping-hand guardsman female-guard male-guard sleuth_or_spy female-detective
male-detective no_good woman-gesturing-no man-gesturing-no ok_woman woman-gesturing-ok man-gesturing-ok bow
woman-bowing man-bowing raising_hand woman-raising-hand man-raising-hand person_frowning woman-frowning
man-frowning person_with_pouting_face woman-pouting man-pouting face_palm woman-facepalming man-facepalming
pregnant_woman breast-feeding prince person_in_tuxedo woman_in_tuxedo man_in_tuxedo mrs_claus shrug
woman-shrugging man-shrugging ninja superhero female_superhero male_superhero supervillain
female_supervillain male_supervillain deaf_person deaf_woman deaf_man adult farmer cook person_feeding_baby
mx_claus student singer artist teacher factory_worker technologist office_worker mechanic scientist
astronaut firefighter red_haired_person curly_haired_person bald_person white_haired_person health_worker
judge pilot child older_adult bearded_person woman_with_beard man_with_beard person_with_headscarf mage
female_mage male_mage fairy female_fairy male_fairy vampire female_vampire male_vampire merperson mermaid
merman elf female_elf male_elf pregnant_man pregnant_person person_with_crown
"""

_ACTIVITIES = """
snowboarder runner woman-running man-running surfer woman-surfing man-surfing horse_racing swimmer
woman-swimming man-swimming weight_lifter woman-lifting-weights man-lifting-weights golfer woman-golfing
man-golfing man_with_probing_cane man_in_motorized_wheelchair man_in_manual_wheelchair woman_with_probing_cane
woman_in_motorized_wheelchair woman_in_manual_wheelchair dancer massage woman-getting-massage
man-getting-massage haircut woman-getting-haircut man-getting-haircut man_in_business_suit_levitating
man_dancing rowboat woman-rowing-boat man-rowing-boat bicyclist woman-biking man-biking mountain_bicyclist
woman-mountain-biking man-mountain-biking walking woman-walking man-walking bath sleeping_accommodation
person_doing_cartwheel woman-cartwheeling man-cartwheeling juggling woman-juggling man-juggling water_polo
woman-playing-water-polo man-playing-water-polo handball woman-playing-handball man-playing-handball
standing_person woman_standing man_standing kneeling_person woman_kneeling man_kneeling
person_with_probing_cane person_in_motorized_wheelchair person_in_manual_wheelchair person_in_steamy_room
woman_in_steamy_room man_in_steamy_room person_climbing woman_climbing man_climbing person_in_lotus_position
woman_in_lotus_position man_in_lotus_position person_with_ball woman-bouncing-ball man-bouncing-ball
"""

EMOJI_NAMES = tuple(_NAMES.split())
ACTIVITY_NAMES = tuple(_ACTIVITIES.split())
