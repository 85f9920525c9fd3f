# %% [markdown]
# # What do the words mean?
# > A glossary: the terms of the field and of this book, each in a sentence or two.
#
# ## Stars and their labels
# - **Label.** A property of a star that we want to know or already know: its temperature, its gravity, an abundance.
# - **Teff.** The effective temperature: that of a black body which sends as much light per square metre. In kelvin. The Sun has 5,772 K, the giants of this book 3,500 to 5,500 K.
# - **log g.** The decimal logarithm of the gravity at the surface, in cm/s². The Sun has 4.44; a giant has 0 to 3.5, because it is large.
# - **[Fe/H], [M/H].** Iron, or all metals together, compared with hydrogen and with the Sun, as a decimal logarithm: -1 means a tenth of the Sun's share. The unit of such logarithms is the *dex*.
# - **[Mg/Fe], [Si/Fe], [α/M], [C/M], [N/M].** Elements compared with iron or with all metals. The α elements are oxygen, magnesium, silicon, sulphur, calcium and titanium.
# - **Giant, dwarf.** A dwarf burns hydrogen in its core, as the Sun does. A giant has used it up and has grown.
# - **Kiel diagram.** Gravity against temperature. Stars cannot be everywhere in it.
# - **Isochrone.** The line on which stars of one age and composition lie. Its points are numbered by the **EEP**, the equivalent evolutionary point: the same number is the same stage of life.
#
# ## Spectra
# - **APOGEE.** A survey of the Milky Way in the near infrared, 1.51 to 1.70 micrometres, part of the Sloan Digital Sky Survey (SDSS).
# - **Chip.** One of the three detectors; between them there are gaps.
# - **Grid.** The wavelengths of the pixels, the same for all stars ([what a star is to us](00_survey.ipynb)); also the set of labels for which the book computed [spectra from physics](C_synthesis.ipynb).
# - **Pixel.** One number of the spectrum: the flux in a narrow step of wavelength. The survey's grid has 8,575 pixels; 7,214 of them, the **on-band** ones, are filled in every star.
# - **Vacuum wavelength.** Light is a little slower in air, so its wavelength there is shorter by 4 to 5 Ångström in our range. The survey gives wavelengths in vacuum.
# - **Flux, error, ivar.** How much light, its standard deviation, and the inverse variance 1/error². A pixel that nobody should use has ivar 0.
# - **Pixel mask.** Bits that say what happened to a pixel: a cosmic ray, a sky line, *persistence* (the detector's memory of brighter light).
# - **SNR.** Signal-to-noise ratio: flux over error, for a typical pixel.
# - **Continuum.** The light without lines. In a cool star no pixel is free of lines, so one draws a **pseudo-continuum** by a fixed rule, the same for every star.
# - **LSF.** Line-spread function: the shape that the spectrograph gives to an infinitely narrow line. Its width over the wavelength is 1/**R**, the resolution; APOGEE has R = 22,500.
# - **apStar, aspcapStar, allStar.** The survey's files: a star's combined spectrum, the same normalized by the survey's pipeline (**ASPCAP**), and the catalogue of all stars' labels.
# - **Archive.** A folder of files, laid out as the survey lays out its own, on disk or on a server ([fetching](01_fetch.ipynb); [where the stars come from](A_archives.ipynb)).
# - **Field.** One pointing of the telescope, a few degrees wide, and the name of the folder with its stars' files ([what a star is to us](00_survey.ipynb)).
# - **Product.** A kind of file: `apstar` is raw flux, `aspcapstar` is normalized by the survey ([what a star is to us](00_survey.ipynb)).
# - **Catalogue.** The survey's table of its stars, with the labels that it measured and their errors ([cleaning](02_clean.ipynb)).
# - **Cut.** A rule that drops stars by one column of the catalogue, such as all with a signal-to-noise ratio below 50 ([what a star is to us](00_survey.ipynb); applied in [cleaning](02_clean.ipynb)).
# - **Visit.** One observation of a star; a star's spectrum combines several.
# - **Rest frame.** The wavelengths that a star would show if it stood still. A star that moves at v km/s has them all longer by the factor 1 + v/c; **barycentric correction** takes out the Earth's own motion ([a spectrum of your own](20_spectrum.ipynb)).
# - **Resampling.** Bringing a spectrum onto other pixels. New pixels that share an old one share its noise ([a spectrum of your own](20_spectrum.ipynb)).
# - **mwmStar, mwmVisit, astra.** Files of a star and of its visits in SDSS-V's Milky Way Mapper, and the software that writes them ([SDSS-V](22_mwm.ipynb)).
# - **Guard.** A second model beside the one that gives labels; it measures what should not be in a spectrum, such as a velocity or another star's light, and flags what no star like the training stars explains ([the guard](18_refusal.ipynb)).
# - **Repeats.** Labels of several visits of one star; their scatter tests the errors ([visits](21_visits.ipynb)).
# - **Persistence.** A detector's memory of brighter light, flagged in the pixel mask ([visits](21_visits.ipynb)).
#
# ## Models
# - **Training stars.** Stars whose labels we trust, from which a model learns.
# - **Generative model.** A model that draws the spectrum from the labels, so that we can look at what it believes. The opposite direction is a **reader**.
# - **Vectorizer, terms, coefficients.** The Cannon's polynomial: the terms are products of labels; each pixel has a coefficient for each term.
# - **Scaled label, pivot, scale.** A label minus the training mean (pivot), over the training standard deviation (scale).
# - **Scatter.** What the polynomial gets wrong in a pixel beyond the noise.
# - **Ridge regression.** A straight line from pixels to labels, with a penalty that keeps its coefficients small ([a straight line](13_readers.ipynb)).
# - **Inversion.** Finding the labels whose model spectrum fits best.
# - **chi2.** The sum over pixels of (flux - model)², each in units of its variance. If model and errors are right, it is about the number of pixels.
# - **Box.** The range of labels that the search may not leave, a quarter beyond the training stars.
# - **Hidden labels.** Numbers of a star that no catalogue gives and that a Cannon learns with the rest. They take in what stars differ in beyond their labels, so that it no longer passes for noise ([hidden labels](16_hidden.ipynb)).
# - **Latents.** A few dozen numbers that hold nearly all that a giant's spectrum says. A model that reads them need not look at 7,214 pixels ([latents](17_latents.ipynb)).
# - **Gaussian process.** A smooth curve through points with errors that also says how far it may be off. Here it leads from latents to labels ([latents](17_latents.ipynb)).
# - **Augmented network.** A network that is trained on thousands of noisy copies of its stars. The copies are wild where pixels are bad, and so it learns not to rely on these ([augmentation](15_augmentation.ipynb)).
# - **Error-aware network.** A network that is given each pixel's error beside its flux. It trusts precise pixels, fills bad ones from their neighbours, and states an error of each label ([augmentation](15_augmentation.ipynb)).
# - **Digest.** A short number computed from all bytes of a file or of a folder, which tells whether two are the same ([where the stars come from](A_archives.ipynb)).
# - **Emulator.** A fast formula for spectra that physics computes slowly.
#
# ## Errors
# - **Truth.** The labels that a synthetic star was made from. For a real star nobody knows them; there is only the **catalogue**.
# - **Left out.** A star that took no part in training. In **folds** every star is left out once.
# - **RMSE.** Root mean square of predicted minus catalogue. **Scaled RMSE**: over the label's own spread; at 1 a model knows nothing. **Bias**: the mean difference. **Robust scatter**: 1.48 times the median distance from the median.
# - **Covariance.** How the errors of labels go together; its diagonal holds their squares.
# - **Formal error.** What the noise of the photons does, if the model is exact.
# - **Photon limit.** The smallest error that the noise of a spectrum allows, whatever the model: the bound of Cramér and Rao. A model that reaches it can be helped by more light alone ([how many stars, how much light](27_curves.ipynb)).
# - **Learning curve.** A model's error against the number of its training stars. Where it has become flat, more stars do not help ([how many stars, how much light](27_curves.ipynb)).
# - **Calibrated error.** An error that was made to hold on left-out stars.
# - **Coverage.** The share of stars within one, or two, stated errors: 68 % and 95 % if the errors are right. The **pull** is the difference in units of the stated error ([judging](07_judging.ipynb)).
# - **Flag.** A reason to doubt a star's labels.
# - **Posterior, prior, MCMC.** The probability of labels given the spectrum, what we believed before, and a random walk that draws from it.
# - **Reference implementation.** A slow and plain version of a computation, which the fast one must agree with.
#
# ## This book
# - **The original lab.** The exercise from which this book grew: an APOGEE exercise of a university data-laboratory course (inputs public as `ucb-datalab`), a student's solution, and its published table.
# - **Ledger.** The account of every star: which rule dropped it, and why.
# - **Recipe.** What was done to a spectrum; it travels with the spectrum and with the model.
# - **Profile.** `quick` runs in minutes, `full` computes every number.
